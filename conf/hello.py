"""The application of web.toml: plain ASGI, to show where the worker, its pools and a job are."""


async def app(scope, receive, send):
    """Count visits in SQLite, and say which worker of which generation has answered."""
    if scope["type"] != "http":
        raise NotImplementedError(scope["type"])  # no lifespan, no websockets
    worker, job = scope["state"]["worker"], scope["state"]["job"]
    # The context ends when a stop runs out of time: a statement that runs then is interrupted.
    async with worker.pools["main"].acquire(job.ctx) as conn:
        await conn.execute("create table if not exists visits (n integer)")
        await conn.execute("insert into visits values (1)")
        cursor = await conn.execute("select count(*) from visits")
        (visits,) = await cursor.fetchone()
        await conn.commit()
    text = f"visit {visits}, answered by {worker.id} of generation {worker.generation}\n"
    headers = [(b"content-type", b"text/plain"), (b"content-length", b"%d" % len(text))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": text.encode()})
