"""Split learning over a network: participants and server as processes of their own, joined by gRPC streams.

    frames        the messages: what may be said, checked strictly
    contract      what both sides must have in common, and the sizes that follow from it
    terms         what of it the streams must know
    certificates  a private authority, a server certificate and a token
    access        who may connect to whom, and how
    client        a participant

The server is two processes, so that streams and training do not wait for each other's Python:

    federation    the rounds, in the process that trains
    office        its side of the desk
    link          what the two processes say to each other
    process       the process of the streams
    desk          where streams and the round in training meet
    answers       what was answered, kept for those that come back
    service       the streams

A stream is a conversation: the participant says something, the server answers it, and nothing else is sent. So
there is at most one message of each participant on the server, and the next is read when it has been answered.
"""
