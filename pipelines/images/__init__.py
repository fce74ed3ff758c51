"""Pictures of a request: from what a message says of one to the RGB that a person would see."""
