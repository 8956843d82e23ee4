"""The Talker: from text and the Thinker's states to codes of speech."""
