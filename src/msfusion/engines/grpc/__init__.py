"""Any method over a network: participants and server as processes of their own, joined by gRPC streams.

    packing       frames as bytes, checked strictly
    frames        what may be said
    messages      tasks and updates, in pieces of a bounded size
    access        who may connect to whom, and how
    certificates  a private authority, a server certificate and a token for each participant
    tokens        the tokens as the server knows them
    listening     where a server is, and how patient
    responses     what was answered in the middle of a task
    places        who is there, and what each is to do
    service       the streams on the server
    network       the engine: it hands out tasks and brings back updates
    calling       a participant's stream, found again whenever it is lost
    participant   a participant's work
    sent          what has left a participant, in a log of its own
    kept          what a participant keeps on its own machine between rounds

A stream is a conversation: the participant says something, the server answers it, and nothing else is sent.
"""
