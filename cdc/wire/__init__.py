"""The replication protocol without I/O: bytes to messages and back.

`frames` is the outer layer (XLogData, keepalive, status), `pgoutput` decodes what an XLogData
carries into the types of `messages`. Nothing here keeps state or knows a socket.
"""
