"""Several processes of one run, one a device, as torchrun starts them."""
