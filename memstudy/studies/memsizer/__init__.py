"""The encoder-decoder, exact or with MemSizer, and the page that asks it."""
