"""The demonstration: emoji scenes with descriptions, the main job and its report page."""
