"""What reproduce.py is made of: its flags, its trainings, and the search for their settings. May import commands."""
