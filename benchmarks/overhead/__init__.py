"""What protection costs in time, between two refreshes."""
