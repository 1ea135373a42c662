"""Pictures of one's own: found, searched by text, and shown on a local page (`blipfast serve`)."""
