"""What can go wrong on the channel, by whose fault.

    ChannelError
    +-- LocalProtocolError   this end tried to do what the protocol forbids: a bug here
    +-- RemoteProtocolError  the peer did: it loses its connection and is named in the log
    +-- ChannelBroken        nobody broke a rule: the connection is gone (peer died, stream closed)

The blame is the type, so a caller decides by `except` and never by reading the text. No error
changes its class on the way up. A message that can't even be built (a bound is exceeded) is a
ValueError of the dataclass; when it came from the peer it is raised as RemoteProtocolError from
that ValueError.
"""


class ChannelError(Exception):
    """Anything that ends or refuses a conversation on the channel; never raised itself."""


class LocalProtocolError(ChannelError):
    """This end asked for something illegal. Nothing was sent and no state has changed."""


class RemoteProtocolError(ChannelError):
    """The peer sent something illegal. The connection hears nothing any more from then on."""


class ChannelBroken(ChannelError):
    """The connection ended without anybody's fault against the protocol.

    End of file without a Goodbye, a reset stream, or a stream that this end has closed.
    """
