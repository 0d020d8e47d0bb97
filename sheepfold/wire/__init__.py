"""Messages as bytes: one blob each way, judged before it is believed."""
