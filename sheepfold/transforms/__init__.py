"""What is done to an update on its way: a client side, and a server side in reverse order."""
