"""The search page of `d2svse serve`: what it asks, what it shows, and the Gradio page (the extra `[demo]`)."""
