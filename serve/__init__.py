"""Requests over HTTP: a scheduler that lets them share micro-batches, an application with OpenAI's image routes, a page.

Needs the extra ``serve``. Importing the room itself loads nothing.
"""
