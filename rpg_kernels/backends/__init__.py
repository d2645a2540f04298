"""What runs an operator: the back ends, and the choice between them."""
