"""The encoder-decoder, exact or with MemSizer, and its web page."""
