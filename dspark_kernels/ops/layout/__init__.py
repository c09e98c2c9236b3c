"""schedule_prefixes, and the layouts of chains and trees."""
