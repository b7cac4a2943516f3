"""The control API: what the agent can be asked, over a private Unix socket."""
