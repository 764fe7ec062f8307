"""This process: what it tells, writes, shares and keeps."""
