"""The web page on which trained models answer questions about digits."""
