"""What tests talk to: an HTTP server, the chat page and a browser for it, a stand-in for the hub."""
