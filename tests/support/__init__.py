"""What tests share: models, laws, and ways to run them."""
