"""What is computed from answers: scores with intervals, and two measures of other packages."""
