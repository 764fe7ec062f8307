"""All that may be asked, each option once."""
