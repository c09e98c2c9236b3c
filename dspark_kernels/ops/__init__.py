"""The public ops: each checks its arguments, picks a launch configuration and launches one kernel."""
