"""Many runs, or one carried further."""
