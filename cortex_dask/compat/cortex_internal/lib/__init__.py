"""What Cortex' own library offered to handlers."""
