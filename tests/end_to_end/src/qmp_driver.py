# Drives a VM with the public client: each line of standard input is a list, a command's name and its arguments, or
# "wait" and the name of an event. A line of JSON answers each.
import asyncio
import json
import sys

from qemu.qmp import EventListener, QMPClient
from qemu.qmp.qmp_client import ExecuteError


async def main():
    client = QMPClient("vireo")
    await client.connect(sys.argv[1])
    loop = asyncio.get_running_loop()
    early = []
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        name, arguments = json.loads(line)
        if name == "wait":
            while True:
                found = next((event for event in early if event["event"] == arguments), None)
                if found:
                    early.remove(found)
                    break
                early.append(dict(await client.events.get()))
            answer = found
        else:
            try:
                answer = {"return": await client.execute(name, arguments)}
            except ExecuteError as error:
                answer = {"error": {"class": error.error_class, "desc": str(error)}}
        print(json.dumps(answer), flush=True)
    await client.disconnect()


asyncio.run(main())
