"""The web page that answers questions about digits with the models that were trained on them."""
