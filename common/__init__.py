"""What two papers share. Knows no paper by name."""
