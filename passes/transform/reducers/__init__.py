"""Token reducers: how tokens become fewer behind an attention, a file each."""
