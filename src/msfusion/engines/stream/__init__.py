"""Split learning over a network: participants and server as processes of their own, joined by gRPC streams.

    frames        the messages: what may be said, checked strictly
    contract      what both sides must have in common, and the sizes that follow from it
    certificates  a private authority, a server certificate and a token
    access        who may connect to whom, and how
    desk          where streams and the round in training meet
    service       the streams, on the server
    federation    the rounds, on the server
    client        a participant

A stream is a conversation: the participant says something, the server answers it, and nothing else is sent. So
there is at most one message of each participant on the server, and the next is read when it has been answered.
"""
