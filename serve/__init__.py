"""Images for others. Requests over HTTP: a scheduler that lets them share micro-batches, an application with OpenAI's image
routes, a page; and workers on Ray, for very many images (`pool`).

Needs the extra ``serve``, or ``ray``. Importing the room itself loads nothing.
"""
