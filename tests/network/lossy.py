"""A bad line: passes TCP on, some 40 ms late each way, and breaks a connection now and then.

python lossy.py 10.72.0.1:9443 10.71.0.2:9443 --delay 0.04 --drop 0.05
"""

import argparse
import asyncio
import random


class Broke(Exception):
    """The line broke, as it does now and then."""


async def pour(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, delay: float, drop: float) -> None:
    """Pass bytes on, each piece `delay` seconds after it came; raise Broke with a chance of `drop`."""
    waiting: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(64)
    loop = asyncio.get_running_loop()

    async def take() -> None:
        while data := await reader.read(65536):
            await waiting.put((loop.time() + delay, data))
        await waiting.put((loop.time() + delay, b""))

    async def give() -> None:
        while True:
            due, data = await waiting.get()
            await asyncio.sleep(max(0.0, due - loop.time()))
            if not data:
                writer.write_eof()
                return
            if random.random() < drop:
                raise Broke
            writer.write(data)
            await writer.drain()

    async with asyncio.TaskGroup() as both:
        both.create_task(take())
        both.create_task(give())


async def carry(
    there: tuple[str, int], near: tuple[asyncio.StreamReader, asyncio.StreamWriter], delay: float, drop: float
) -> bool:
    """Carry one connection until both ends are done with it, or the line breaks; return whether it broke here."""
    reader, writer = near
    ends, broke, over = [writer], False, False
    try:
        far_reader, far = await asyncio.open_connection(*there)
        ends.append(far)
        async with asyncio.TaskGroup() as both:
            both.create_task(pour(reader, far, delay, drop / 2))
            both.create_task(pour(far_reader, writer, delay, drop / 2))
    except* Broke:
        broke = True
    except* OSError:  # an end broke off by itself
        over = True
    for end in ends:
        end.transport.abort() if broke or over else end.close()
    return broke


async def main() -> None:
    """Listen until killed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("here")
    parser.add_argument("there")
    parser.add_argument("--delay", type=float, default=0.04)
    parser.add_argument("--drop", type=float, default=0.02, help="chance that a piece of up to 64 kB breaks its line")
    args = parser.parse_args()
    (host, port), (far, far_port) = args.here.rsplit(":", 1), args.there.rsplit(":", 1)
    broken = 0

    async def one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal broken
        if await carry((far, int(far_port)), (reader, writer), args.delay, args.drop):
            broken += 1
            print(f"broken {broken}", flush=True)

    server = await asyncio.start_server(one, host, int(port))
    print("listening", flush=True)
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
