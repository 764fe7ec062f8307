"""Every architecture at its real size: is it right, how far does it go, how long does it take."""
