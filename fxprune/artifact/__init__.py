"""What is written, checked, delivered and compared."""
