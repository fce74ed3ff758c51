"""From an answer's text to content, reasoning and calls, and from functions to the grammar of a forced call."""
