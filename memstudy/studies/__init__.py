"""What one study alone needs, a room each."""
