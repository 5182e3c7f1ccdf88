// The model's name in a request's body becomes $model, which upstream.conf hashes.
function by_model(r) {
    try {
        const name = JSON.parse(r.requestText || '{}').model;
        r.variables.model = typeof name === 'string' ? name : '';
    } catch (e) {
        r.variables.model = '';  // the server says what is wrong with the body
    }
    r.internalRedirect('@replica');
}

export default { by_model };
