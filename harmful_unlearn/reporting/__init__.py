"""From figures to a report: tables, plots, Markdown and HTML. Gets figures; measures nothing."""
