SELECT
    `Customer ID` AS customer_id,
    `First name` AS first_name,
    `Last name` AS last_name,
    `E-mail` AS email,
    Town AS city,
    Registered AS signup_date,
    _delivery, _source_file, _source_row
FROM customers
