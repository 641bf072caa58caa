"""Everything that moves weights between processes.

There are two ways to deliver new weights:

    hf_export.py    exports whole Hugging Face tensors on every trainer rank, by broadcasts over the trainer's own group
    connect.py      makes a sender or a receiver, which carry out a plan between trainer ranks and engine ranks

A planned update goes through these modules, from the top:

    sender.py, receiver.py      one update on one rank; their common base class is in endpoint.py
    channel.py                  how one message travels: point to point, or in shared memory
    shared_memory_handshake.py  which receivers can open a sender's memory (shared_memory.py)
    staging.py                  the memory that messages are packed into
    message.py, p2p.py          headers and checksums; sends and receives with a timeout

To add a transport, write a class beside those of ``channel.py``.
"""

FRONT = {
    "connect": ("connect_receiver", "connect_sender"),
    "hf_export": ("HfExporter",),
    "message": ("TransportError",),
    "receiver": ("PlannedReceiver",),
    "sender": ("PlannedSender",),
}
