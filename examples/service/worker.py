"""The recovery worker: takes up what other processes left behind when they died.

``python -m examples.service.worker``, with DATABASE_URL set; SIGTERM ends it gracefully.
"""

import asyncio
import logging

from examples.service.wiring import opened
from saga_store.recovery import run_until_signalled


async def main() -> None:
    logging.basicConfig(level=logging.INFO)
    async with opened() as service:
        await run_until_signalled(service.worker)


if __name__ == "__main__":
    asyncio.run(main())
