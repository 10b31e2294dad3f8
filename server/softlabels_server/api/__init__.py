"""The HTTP interface: routes, request and reply formats, problem details and the OpenAPI document."""
