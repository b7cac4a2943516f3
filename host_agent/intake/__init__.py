"""The agent's end of the private channels: who connects, and what is made of what they say."""
