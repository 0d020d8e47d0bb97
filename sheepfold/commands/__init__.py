"""The commands that use what a run made, one file each; heavy imports wait inside them."""
