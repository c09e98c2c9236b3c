"""What several commands of bench use. A helper of one command alone lives in the folder of that command."""
