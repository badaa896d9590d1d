"""The engine: scheduler, requests and the loop between them; folders for its parts."""
