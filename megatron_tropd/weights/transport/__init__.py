"""Everything that moves weights between processes.

Two ways to give new weights to others:

    hf_export.py    whole Hugging Face tensors on every trainer rank, by broadcasts over the trainer's own group
    connect.py      a plan carried out between trainer ranks and engine ranks: makes a sender or a receiver

A planned update goes through these modules, from the top:

    sender.py, receiver.py      one update on one rank, on the common ground of endpoint.py
    channel.py                  how one message travels: point to point, or in shared memory
    shared_memory_handshake.py  which receivers can open a sender's memory (shared_memory.py)
    staging.py                  the memory that messages are packed into
    message.py, p2p.py          headers and checksums; sends and receives that end in time
    side_group.py               a process group between processes that have nothing else in common

A new transport is a class beside those of ``channel.py``.
"""

FRONT = {
    "connect": ("connect_receiver", "connect_sender"),
    "hf_export": ("HfExporter",),
    "message": ("TransportError",),
    "receiver": ("PlannedReceiver",),
    "sender": ("PlannedSender",),
    "side_group": ("LOOPBACK", "Backend", "host_store", "join_store"),
}
