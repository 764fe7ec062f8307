"""Ahead-of-time inductor: the program compiled to native code, in a package that torch alone loads."""
