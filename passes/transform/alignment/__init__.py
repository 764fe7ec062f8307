"""What ``AlignHeads`` is made of: where a basis is free, the second moments that choose it, and its closed form."""
