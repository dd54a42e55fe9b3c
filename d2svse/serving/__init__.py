"""The search page of `d2svse serve`: queries, HTML and the Gradio application (the extra `[demo]`)."""
