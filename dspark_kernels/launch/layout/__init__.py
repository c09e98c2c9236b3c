"""Launch configurations of scheduling and layouts."""
